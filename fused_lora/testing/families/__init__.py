"""Every family of vision transformers that can be built offline, small, and whether it is served."""
