"""The tracker where other people's trainers hold the loop; each module needs its own extra."""
