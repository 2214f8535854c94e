"""Every family of vision transformers that can be built offline, small; and who is served."""
