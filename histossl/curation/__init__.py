"""From all tiles to a named subset: near-duplicates left out, balanced, or like given examples.

In: a tile index and a backbone. Out: a subset (sorted tile numbers) with its ledger and contact sheet.
"""
