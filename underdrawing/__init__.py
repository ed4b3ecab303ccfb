"""The command, recipes, tracking and the report. Importing it opens no network and starts nothing."""
