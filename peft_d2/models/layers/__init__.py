"""What two models or more share."""
