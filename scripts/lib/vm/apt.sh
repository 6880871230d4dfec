# shellcheck shell=bash
# Packages of other Debian suites, by the machine's own apt, without touching the machine's own apt state.
# Repository addresses, proxies and TLS settings all come from the machine's apt configuration.
# Uses $out, $deb_arch and die of build.sh.
# shellcheck disable=SC2154

keyring=/usr/share/keyrings/debian-archive-keyring.gpg     # package debian-archive-keyring

# content_key FILE...: a hash of what they hold
content_key() { cat "$@" | sha256sum; }

# repo_uri main|security: where this machine gets that part of Debian from
repo_uri() {
    local release uri
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    [ "$1" = main ] || release=$release-$1
    # shellcheck disable=SC2016  # apt expands these, not the shell
    uri=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(CODENAME) $(COMPONENT) $(ORIGIN)' |
        awk -v r="$release" '($2 == r || $3 == r) && $4 == "main" && $5 == "Debian" && !n++ {print $1}')
    [ -n "$uri" ] || die "apt knows no Debian repository for $release (is it in the sources? has 'apt-get update' run?)"
    echo "$uri"
}

# apt_prepare SUITE: private state in $out/apt/SUITE, then update. A bad or missing signature stops the build.
apt_prepare() {
    local suite=$1 dir=$out/apt/$1 kind=main options=target=Packages uri
    case $suite in *-security) kind=security ;; esac
    uri=$(repo_uri $kind)
    [ ! -e $keyring ] || options="$options signed-by=$keyring"      # otherwise: the keys that apt trusts anyway
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    : >"$dir/status"                                                # nothing is installed
    echo "deb [$options] $uri $suite main" >"$dir/sources.list"
    cat >"$dir/apt.conf" <<END
APT::Architecture "$deb_arch";
APT::Architectures { "$deb_arch"; };
Dir::State "$dir/state";
Dir::State::status "$dir/status";
Dir::Cache "$dir/cache";
Dir::Etc::SourceList "$dir/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Acquire::Languages "none";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
END
    apt-get -c "$dir/apt.conf" -qq --error-on=any update
}

# apt_depends SUITE PACKAGE REGEX: names PACKAGE depends on that match REGEX
apt_depends() {
    apt-cache -c "$out/apt/$1/apt.conf" show --no-all-versions "$2" |
        sed -n 's/^\(Pre-\)\{0,1\}Depends: //p' | sed 's/[,|]/\n/g' | sed 's/^ *//; s/ .*//' | { grep -E "$3" || true; }
}

# apt_download SUITE DIR PACKAGE...: hashes are checked against the signed lists
apt_download() {
    local suite=$1 dir=$2; shift 2
    mkdir -p "$dir"
    chown _apt "$dir" 2>/dev/null || true       # apt downloads as this user where it can reach the directory, else as root
    (cd "$dir" && apt-get -c "$out/apt/$suite/apt.conf" -qq download "$@")
}

# apt_transport_settings: the machine's proxy and TLS settings, for a tool that does not read them itself
apt_transport_settings() { apt-config dump | grep -iE '^Acquire::(http|https)::' || true; }
