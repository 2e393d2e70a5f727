"""What the commands in launch/ share."""
