"""AdaCS: pass rates of problems, and responses whose length grows with difficulty."""
