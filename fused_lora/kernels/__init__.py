"""The same functions three ways; each says in one sentence when it cannot serve."""
