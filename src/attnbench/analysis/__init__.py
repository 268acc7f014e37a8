"""What records come to: conclusions drawn from finished runs, without measuring anything and without torch."""
