"""No kernel that this machine has not checked ever touches a user's data (DESIGN.md section 8)."""
