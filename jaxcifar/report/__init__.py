"""Run folders and published numbers, turned into plots and tables."""
