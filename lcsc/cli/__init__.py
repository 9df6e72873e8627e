"""`lcsc VERB key=value ...`, one file a verb."""
