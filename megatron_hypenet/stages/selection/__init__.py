"""Layer selection: methods that say which layers keep softmax attention, a file each; what they
measure with; and the files of scores and of the choice."""
