"""labels.csv, annotations and slide names become one LabelTable per command; splits, exclusions, leakage.

Names are compared here and nowhere else.
"""
