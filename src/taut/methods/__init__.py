"""The methods: one file each, in the folder of its kind. The folder is the list."""
