"""A comparison while it runs: what is compared, whose trial is next, and how all of it is gone on with."""
