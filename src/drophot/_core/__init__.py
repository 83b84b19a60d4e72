"""What knows neither coreset nor mask: random state, memory, order statistics, numbers."""
