from hpcmlip.cli import main

main()
