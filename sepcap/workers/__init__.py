"""Workers: the same work in this process, in processes of this machine, or on a Ray cluster; what dies is replaced and done again."""
