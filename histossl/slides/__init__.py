"""An archive of files becomes pixels with a physical scale. Label and macro images are never opened.

In: a folder. Out: `Slide` (reading/), tissue and quality (quality/), one row per file in archive.csv.
"""
