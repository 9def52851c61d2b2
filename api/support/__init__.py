"""The support service (SS): takes messages in, keeps what became of them, answers for them, and puts right what went wrong."""
