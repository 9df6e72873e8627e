"""The ground floor: standard library and numpy only."""
