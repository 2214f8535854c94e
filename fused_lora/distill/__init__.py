"""Teacher and student: what the one hands to the other."""
