"""What keeps the house in order: lineage, notebooks, the front page, judges, benchmarks."""
