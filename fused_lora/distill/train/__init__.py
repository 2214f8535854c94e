"""The loop: any objective, the paper's schedule, one process or many, killed and taken up again."""
