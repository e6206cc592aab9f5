"""What two or more stages of coarse2fine share, one small module per subject."""
