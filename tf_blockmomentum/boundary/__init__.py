"""What happens at a boundary, in the replica."""
