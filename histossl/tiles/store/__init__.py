"""The zips on disk and the one index over them; named subsets; pseudonyms; files of the same content."""
