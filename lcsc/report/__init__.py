"""Tables, plots and pages from run directories; runs nothing."""
