"""The files of a finished curve become pages and pictures. Reads results, computes no statistic of its own."""
