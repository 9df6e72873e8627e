"""Tunes in ABC notation: reading, tokens, checking, composing by rule, files to play and to see."""
