"""What comes out: tracking, selection, models and the leaderboard."""
