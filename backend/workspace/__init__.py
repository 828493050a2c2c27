"""Workspaces: what `convert` makes of a model, in the folders and under the names of LMDeploy's."""
