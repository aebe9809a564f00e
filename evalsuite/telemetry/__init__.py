"""What the machine is and what a run takes from it."""
