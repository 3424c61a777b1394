"""Reports: one HTML file that shows what a patch is and what it does, for people to read."""
