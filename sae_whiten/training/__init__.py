"""SAELens' trainers and runners, training under whitening."""
