"""What stands before step 0: the run with its method, loader and optimizer, the plan, memory and time."""
