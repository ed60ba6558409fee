"""What may be wrong with a data set.

table            the rules: names, severities, remedies
findings         faults with their places, counted
check            every rule looks at every row, in one pass
content          characters, template tokens, secrets and personal data
sensitive        the patterns of the latter
keys             what makes rows equal
shingles, near_duplicates, leakage    rows that are nearly equal, and held-out rows that stand in the others
"""
