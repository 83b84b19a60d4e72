"""What makes a run the experiment that it is: its code, settings, data and environment."""
