"""What keeps the house in order: lineage, new lessons, notebooks, the front page, hashes, judges, benchmarks."""
