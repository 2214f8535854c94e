"""Which module of a model becomes what; the report; the way back."""
