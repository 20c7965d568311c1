"""Split each sequence over context-parallel ranks: ring attention or all-to-all, right by construction."""
