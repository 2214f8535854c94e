"""What a transformer block keeps for backward under each method: counted, not timed."""
