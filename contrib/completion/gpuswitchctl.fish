# Completion of gpuswitchctl for fish: the command itself says what a word may become.

function __gpuswitchctl_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($words[1] __complete $words[2..-1] "$current" 2>/dev/null)
    if test "$found" = :files
        __fish_complete_path "$current"
    else
        string collect -- $found
    end
end
complete -c gpuswitchctl -f -a '(__gpuswitchctl_complete)'
