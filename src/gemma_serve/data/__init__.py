"""Files that ship with the package: the demo model, chat templates, the catalogue."""
