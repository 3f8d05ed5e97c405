"""Several processes, one stream: what ranks say to each other, how they start, and how they notice a lost one."""
