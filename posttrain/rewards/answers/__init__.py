"""Mathematical answers: read from text into trees, and compared there."""
