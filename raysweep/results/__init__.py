"""Results: MLflow tracking, progress, exported models and the leaderboard."""
