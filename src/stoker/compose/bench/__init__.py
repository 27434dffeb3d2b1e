"""`stoker bench`: a run's speed and memory, measured on random rows beside other trainers and the floor."""
