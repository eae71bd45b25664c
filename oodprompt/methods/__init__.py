"""What the author of a method uses: the contracts, prompts, groups, measures of dependence."""
