"""The KV of all sessions: which blocks exist and who holds them (`pool`, `cache`: host only) and their bytes (`store`: torch)."""
