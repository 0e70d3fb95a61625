"""What an attacker inside a container can see and do, and what happens to one who takes all he can get."""
