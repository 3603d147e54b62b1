"""What a model can do: tasks, how much of its context it uses, and what tasks share."""
